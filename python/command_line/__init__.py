"""What every program does with its arguments and with failures that a user can mend."""
