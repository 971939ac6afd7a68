"""The generative architect: invents blueprints, never code. No torch in this process."""
