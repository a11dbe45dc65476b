"""Speech in, figures out: audio, data sets, windows and collators, transcripts, metrics."""
