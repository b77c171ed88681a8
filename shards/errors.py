"""What can go wrong with a dataset of shards.

DatasetError   the dataset is absent or is not the one expected: the user's mistake
ShardError     the bytes of a shard are damaged
StoreError     an object store gave no answer, which it may give when it is asked again
"""


class DatasetError(Exception):
    """The dataset is absent, incomplete, or was made with other settings than the ones asked for."""


class ShardError(Exception):
    """A shard is damaged; the message names the tar and the key."""


class StoreError(Exception):
    """An object store failed; the message names the URL and what the store said."""
