"""The HTML page: frames and metrics in, one self-contained page and two pictures out."""
