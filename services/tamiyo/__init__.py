"""Tamiyo: decides where and when to grow, and keeps what was decided."""
