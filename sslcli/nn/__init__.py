"""Building blocks of methods: heads, EMA, BatchNorm variants, decoder, random numbers, losses, schedules."""
