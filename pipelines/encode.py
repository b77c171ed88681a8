"""Videos and captions to latent shards: ``python -m pipelines.encode --input internvid [key.path=value ...]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, default_config, run
from pipelines.config import load_config
from stages.encode import EncodeConfig, describe, encode
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Encode videos and captions into latent shards.")
    parser.add_argument("--input", choices=("internvid", "folder", "shapes"), help="the kind of dataset")
    parser.add_argument(
        "--retry", metavar="REASON", action="append", default=[], help="plan clips rejected for REASON anew"
    )
    options = parser.read(arguments)
    file = options.config or default_config("encode", options.input or "shapes")
    given = {"input": options.input} if options.input else {}
    config = load_config(EncodeConfig, file, options.settings, given)
    if options.dry_run:
        print(settings_text(config), end="")
        print(describe(config, options.retry))
        return
    summary = encode(config, options.retry)
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["rejected"].items())) or "none"
    print(
        f"{summary['rows']} rows: {summary['written']} clips written as {summary['samples']} samples in "
        f"{summary['shards']} shards ({summary['bytes'] / 1e6:.1f} MB), {summary['duplicates']} duplicates, "
        f"rejected: {rejected}; in {config.output}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
