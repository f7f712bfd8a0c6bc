"""End-to-end tests: real servers, real process managers, the shipped configuration files."""
