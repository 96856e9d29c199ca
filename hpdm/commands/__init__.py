"""What a user types: one module per ``hpdm`` command. Only the command line imports it."""
