"""Find out whether nodes and the links between them are fit for ranks, before any rank starts."""
