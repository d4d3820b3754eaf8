"""The command `phema`. The library is `posthoc_ema`, the trainer `reference_trainer`."""
