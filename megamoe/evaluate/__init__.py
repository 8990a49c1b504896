"""What a trained model can do: captions of pictures, and how many of them are right."""
