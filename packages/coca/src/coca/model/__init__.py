"""The CoCa model, its image encoders and captioning."""
