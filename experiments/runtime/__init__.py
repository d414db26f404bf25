"""What runs a command: its folder, its stages, its progress, its devices."""
