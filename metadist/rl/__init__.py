"""Meta-reinforcement learning: environments, policies, trials and their algorithms."""
