"""What `phema track -- COMMAND` does in the processes of the command."""

from posthoc_ema.torch.launch.following import Launch, start

__all__ = ["Launch", "start"]
