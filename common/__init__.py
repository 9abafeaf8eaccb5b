"""What every other package uses; it imports none of them."""
