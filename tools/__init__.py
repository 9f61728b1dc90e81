"""What a reader of the method never needs: downloads, Bible editions, pictures, the making of tiny-llama."""
