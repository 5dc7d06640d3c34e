"""Many questions asked offline: resumable, one picture after another, errors per item."""
