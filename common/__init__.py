"""What all parts of the product stand on; imports nothing of ours."""
