"""Use a trained model: caption pictures, and score the captions."""
