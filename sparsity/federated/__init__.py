"""Federated sparse training: who holds which data, and what is sent."""
