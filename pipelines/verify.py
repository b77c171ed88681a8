"""Every byte of a dataset against its checksums: ``python -m pipelines.verify SHARDS [--repair]``."""

import sys
from collections.abc import Sequence

from pipelines.command import Parser, run
from pipelines.config import load_config
from shards.verification.verify import describe
from stages.encode_config import EncodeConfig
from stages.errors import ConfigError, WorkError
from stages.output import SETTINGS
from stages.repair import check, local_folder, repair


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Read a dataset again, name everything that is damaged, and make it again if asked to.")
    parser.usage = "%(prog)s [-h] [--dry-run] [--repair [--config FILE]] SHARDS [key.path=value ...]"
    parser.add_argument(
        "--repair", action="store_true", help="set damaged shards aside and encode them again, as its config.yaml says"
    )
    options = parser.read(arguments)
    shards, *settings = options.settings or [""]
    if settings and not options.repair:
        raise ConfigError(f"found {settings[0]!r}: settings are those of the encode, for --repair alone")
    described, _ = describe(shards)
    if options.repair:  # before hours of reading
        root = local_folder(shards)
        config = load_config(EncodeConfig, options.config or root / SETTINGS, settings, {"output": shards})
    if options.dry_run:
        print(described)
        return
    checked = check(shards)
    if options.repair and checked.faults:
        print(checked)
        print("\n".join(repair(root, checked.faults, config)))
        checked = check(shards)
    if checked.faults:
        raise WorkError(f"{checked}")
    print(checked)


if __name__ == "__main__":
    sys.exit(run(main))
