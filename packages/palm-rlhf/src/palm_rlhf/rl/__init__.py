"""Reinforcement learning: objectives, rollouts, losses and the trainers of policies."""
