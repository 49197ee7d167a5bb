"""One file a paper family. A method imports base, nn, losses and distributed, and nothing else of sslcli."""
