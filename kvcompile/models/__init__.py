"""Where models come from: headers read without torch (`header`), weights (`load`), and the cache on disk (`cache`)."""
