//! The CUDA engine on a device: each op against its CPU twin and a reference in f64, whole models against the CPU.
//!
//! The binary needs neither cargo nor the sources: `scripts/gpu build` makes it on a machine without a GPU and
//! `scripts/gpu run` starts it on one with, in the project's folder. Without a device each test says so and passes,
//! unless EREMOIS_TEST_GPU is set: where a device is expected its absence is a failure.
//! EREMOIS_TEST_GPU_SIZES=small leaves out the large sizes, for a device that is emulated.

mod gpu {
    pub mod attention;
    pub mod desk;
    pub mod engine;
    pub mod exact;
    pub mod gemm;
    pub mod models;
    pub mod rows;
    pub mod synthetic;
}
