"""Videos and captions to latent shards: ``python -m pipelines.encode --input internvid [key.path=value ...]``."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from pipelines.command import Parser, default_config, run
from pipelines.config import load_config
from shards.compaction import lacking
from shards.schema import TEXT_PREFIX
from stages.encode import encode, encode_text
from stages.encode_config import EncodeConfig
from stages.errors import ConfigError
from stages.output import settings_text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Encode videos and captions into latent shards.")
    parser.add_argument("--input", choices=("internvid", "panda70m", "folder", "shapes"), help="the kind of dataset")
    parser.add_argument(
        "--retry", metavar="REASON", action="append", default=[], help="plan clips rejected for REASON anew"
    )
    parser.add_argument("--columns", metavar="text.NAME", help="make this text column alone, for the latents there are")
    parser.add_argument("--tune", action="store_true", help="measure the best vae.batch_frames here, then stop")
    options = parser.read(arguments)
    config = _config(options)
    if options.tune:
        from stages.tune import tune  # loads PyTorch, which a job itself only needs in its workers

        print(tune(config))
    elif options.dry_run:
        from stages.estimate import describe, describe_text

        print(settings_text(config), end="")
        print(describe_text(config) if options.columns else describe(config, options.retry))
    else:
        summary = encode_text(config) if options.columns else encode(config, options.retry)
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["rejected"].items())) or "none"
        print(
            f"{summary['rows']} rows: {summary['written']} clips written as {summary['samples']} samples in "
            f"{summary['shards']} shards ({summary['bytes'] / 1e6:.1f} MB), {summary['filtered']} filtered, "
            f"{summary['duplicates']} duplicates, rejected: {rejected}; in {config.output}"
        )
        for column, shards in summary["incomplete"].items():
            print(lacking(column, shards))


def _config(options: Namespace) -> EncodeConfig:
    file = options.config or default_config("encode", options.input or "shapes")
    given: dict = {"input": options.input} if options.input else {}
    if options.columns:
        if not (options.input or options.config) or options.retry:
            raise ConfigError("--columns: expected --input KIND or --config FILE as for the dataset, and no --retry")
        column = options.columns.removeprefix(TEXT_PREFIX)
        if column == options.columns:
            raise ConfigError(f"--columns {column}: expected {TEXT_PREFIX}NAME; latents are made with their own plan")
        given["text_encoder"] = {"column": column}
    return load_config(EncodeConfig, file, options.settings, given)


if __name__ == "__main__":
    sys.exit(run(main))
