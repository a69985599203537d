"""What every kernel family shares: the contract, options, dropout and work lists."""
