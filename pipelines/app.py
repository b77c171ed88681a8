"""A web page to sample on, on this machine unless ``host`` says otherwise.

``python -m pipelines.app [--config FILE] [key.path=value ...]``
"""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.errors import ConfigError
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    options = Parser("Sample on a web page.").read(arguments)
    try:
        from stages.sampling.web import AppConfig, Page, serve
    except ModuleNotFoundError as absent:
        if absent.name != "gradio":
            raise
        raise ConfigError(
            "the page needs gradio, which is not installed: pip install -e '.[app]' in the project's folder"
        ) from None
    config = load_config(AppConfig, options.config, options.settings)
    if options.dry_run:
        print(settings_text(config), end="")
        print(Page(config).about)
        return
    serve(config)


if __name__ == "__main__":
    sys.exit(run(main))
