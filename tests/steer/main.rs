//! Steering in the kernel, with unmodified servers: each test has a network namespace and a cgroup
//! of its own. They are skipped, visibly, where the machine cannot steer.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chaos;
mod choosing;
mod counting;
mod existing;
mod families;
mod hostile;
mod lab;
mod life;
mod policies;
mod reconcile;
mod shared;
mod shared_chaos;
mod shared_dispatcher;
mod shared_lab;
mod shared_life;
mod shared_probe;
