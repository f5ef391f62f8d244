"""What a finished run shows: arrays in, arrays or figures out."""
