"""What all rooms use and nobody is promised."""
