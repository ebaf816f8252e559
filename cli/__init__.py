"""The `fedzo` command line; everything heavy is imported by the command that needs it."""
