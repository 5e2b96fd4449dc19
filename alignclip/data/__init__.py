"""MDS sets as training and evaluation read them; the only place that touches Streaming's insides."""
