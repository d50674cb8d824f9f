"""Define meta-reinforcement learning: environments, policies, trials and their algorithms."""
