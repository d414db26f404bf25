"""What every command needs: its folder, its stages, its progress, its devices."""
