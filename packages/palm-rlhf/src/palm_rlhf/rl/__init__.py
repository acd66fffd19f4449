"""Reinforcement learning: PPO, GRPO and what they share."""
