"""Meta-training: episodes, the meta-gradient, and the LightningModule of both."""
