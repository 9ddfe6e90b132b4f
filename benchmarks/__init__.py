"""Benchmarks that compare this library with other libraries. They are not part of the installed
package, so run them from a checkout."""
