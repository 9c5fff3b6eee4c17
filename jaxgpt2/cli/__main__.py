from jaxgpt2.cli import main

main()
