"""From a base model to an assistant: reward models, reinforcement learning, preferences, judging."""
