"""The work behind the commands: plan, decode, encode, train, sample, evaluate."""
