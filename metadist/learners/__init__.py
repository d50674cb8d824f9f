"""The mathematics of one experiment: few-shot learning and meta-reinforcement learning."""
