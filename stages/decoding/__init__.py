"""Videos and pictures to the frames that a bucket holds."""
