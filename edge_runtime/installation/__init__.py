"""A board in service: checks of the machine, units of systemd, what is installed."""
