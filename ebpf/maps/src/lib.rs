//! Records shared between the XDP program and user space.
#![no_std]
