"""A dataset to a page: ``python -m pipelines.browse SHARDS [key=value ...]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from stages.browsing.browse import BrowseConfig, browse, describe, result_lines
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Show what is in a dataset: clips decoded back beside their source, latents, captions, rejects.")
    parser.usage = "%(prog)s [-h] [--config FILE] [--dry-run] SHARDS [key.path=value ...]"
    options = parser.read(arguments)
    shards, *settings = options.settings or [""]
    config = load_config(BrowseConfig, options.config, settings, {"shards": shards})
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config))
        return
    print("\n".join(result_lines(browse(config))))


if __name__ == "__main__":
    sys.exit(run(main))
