/* The driver's names of events, of captures, and of the wait for the device. */

#include "double.h"

int cudaEventCreateWithFlags(void **event, unsigned flags);
int cudaEventDestroy(void *event);
int cudaEventRecord(void *event, void *stream);
int cudaEventQuery(void *event);
int cudaEventSynchronize(void *event);
int cudaDeviceSynchronize(void);
int cudaStreamIsCapturing(void *stream, int *status);
int cudaThreadExchangeStreamCaptureMode(int *mode);

int cuEventCreate(void **event, unsigned flags) { return cudaEventCreateWithFlags(event, flags); }
int cuEventDestroy_v2(void *event) { return cudaEventDestroy(event); }
int cuEventRecord(void *event, void *stream) { return cudaEventRecord(event, stream); }
int cuEventQuery(void *event) { return cudaEventQuery(event); }
int cuEventSynchronize(void *event) { return cudaEventSynchronize(event); }
int cuStreamIsCapturing(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }
int cuThreadExchangeStreamCaptureMode(int *mode) { return cudaThreadExchangeStreamCaptureMode(mode); }
int cuCtxSynchronize(void) { return cudaDeviceSynchronize(); }
