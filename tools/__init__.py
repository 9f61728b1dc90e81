"""Everything around the method: command lines, downloads, reports, pictures and the making of tiny-llama."""
