"""What text that goes through the original model tells about the inputs of its layers."""
