"""One file per command or small family of commands."""
