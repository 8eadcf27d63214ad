"""What every room uses: errors, progress, settings."""
