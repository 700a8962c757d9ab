"""The C functions of cuDNN 9 that are called, transcribed from its headers.

One row a function: ``name:type`` per parameter, in order, with the header's parameter names. Types:
``ptr`` (a handle, a descriptor, an array, an address), ``int`` (also every enumeration and
``int32_t``), ``uint`` (``uint32_t``), ``size`` (``size_t``), ``ull`` (``unsigned long long``),
``float``, ``double``. All of them return a ``cudnnStatus_t``.

A test compares every row with the headers where they are installed.
"""

from __future__ import annotations

import ctypes

__all__ = ["CTYPES", "PROTOTYPES", "AlgorithmPerformance", "argument_types"]

CTYPES = {
    "ptr": ctypes.c_void_p,
    "int": ctypes.c_int,
    "uint": ctypes.c_uint32,
    "size": ctypes.c_size_t,
    "ull": ctypes.c_ulonglong,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}

PROTOTYPES = {
    # Handles
    "cudnnCreate": "handle:ptr",
    "cudnnDestroy": "handle:ptr",
    "cudnnSetStream": "handle:ptr streamId:ptr",
    "cudnnQueryRuntimeError": "handle:ptr rstatus:ptr mode:int tag:ptr",
    # Tensors and filters
    "cudnnCreateTensorDescriptor": "tensorDesc:ptr",
    "cudnnDestroyTensorDescriptor": "tensorDesc:ptr",
    "cudnnSetTensorNdDescriptor": "tensorDesc:ptr dataType:int nbDims:int dimA:ptr strideA:ptr",
    "cudnnGetTensorNdDescriptor": (
        "tensorDesc:ptr nbDimsRequested:int dataType:ptr nbDims:ptr dimA:ptr strideA:ptr"
    ),
    "cudnnCreateFilterDescriptor": "filterDesc:ptr",
    "cudnnDestroyFilterDescriptor": "filterDesc:ptr",
    "cudnnSetFilterNdDescriptor": (
        "filterDesc:ptr dataType:int format:int nbDims:int filterDimA:ptr"
    ),
    "cudnnAddTensor": "handle:ptr alpha:ptr aDesc:ptr A:ptr beta:ptr cDesc:ptr C:ptr",
    # Convolution
    "cudnnCreateConvolutionDescriptor": "convDesc:ptr",
    "cudnnDestroyConvolutionDescriptor": "convDesc:ptr",
    "cudnnSetConvolutionNdDescriptor": (
        "convDesc:ptr arrayLength:int padA:ptr filterStrideA:ptr dilationA:ptr mode:int "
        "computeType:int"
    ),
    "cudnnSetConvolutionGroupCount": "convDesc:ptr groupCount:int",
    "cudnnSetConvolutionMathType": "convDesc:ptr mathType:int",
    "cudnnGetConvolutionForwardAlgorithm_v7": (
        "handle:ptr srcDesc:ptr filterDesc:ptr convDesc:ptr destDesc:ptr requestedAlgoCount:int "
        "returnedAlgoCount:ptr perfResults:ptr"
    ),
    "cudnnFindConvolutionForwardAlgorithmEx": (
        "handle:ptr xDesc:ptr x:ptr wDesc:ptr w:ptr convDesc:ptr yDesc:ptr y:ptr "
        "requestedAlgoCount:int returnedAlgoCount:ptr perfResults:ptr workSpace:ptr "
        "workSpaceSizeInBytes:size"
    ),
    "cudnnGetConvolutionForwardWorkspaceSize": (
        "handle:ptr xDesc:ptr wDesc:ptr convDesc:ptr yDesc:ptr algo:int sizeInBytes:ptr"
    ),
    "cudnnConvolutionForward": (
        "handle:ptr alpha:ptr xDesc:ptr x:ptr wDesc:ptr w:ptr convDesc:ptr algo:int workSpace:ptr "
        "workSpaceSizeInBytes:size beta:ptr yDesc:ptr y:ptr"
    ),
    "cudnnGetConvolutionBackwardDataAlgorithm_v7": (
        "handle:ptr filterDesc:ptr diffDesc:ptr convDesc:ptr gradDesc:ptr requestedAlgoCount:int "
        "returnedAlgoCount:ptr perfResults:ptr"
    ),
    "cudnnFindConvolutionBackwardDataAlgorithmEx": (
        "handle:ptr wDesc:ptr w:ptr dyDesc:ptr dy:ptr convDesc:ptr dxDesc:ptr dx:ptr "
        "requestedAlgoCount:int returnedAlgoCount:ptr perfResults:ptr workSpace:ptr "
        "workSpaceSizeInBytes:size"
    ),
    "cudnnGetConvolutionBackwardDataWorkspaceSize": (
        "handle:ptr wDesc:ptr dyDesc:ptr convDesc:ptr dxDesc:ptr algo:int sizeInBytes:ptr"
    ),
    "cudnnConvolutionBackwardData": (
        "handle:ptr alpha:ptr wDesc:ptr w:ptr dyDesc:ptr dy:ptr convDesc:ptr algo:int "
        "workSpace:ptr workSpaceSizeInBytes:size beta:ptr dxDesc:ptr dx:ptr"
    ),
    "cudnnGetConvolutionBackwardFilterAlgorithm_v7": (
        "handle:ptr srcDesc:ptr diffDesc:ptr convDesc:ptr gradDesc:ptr requestedAlgoCount:int "
        "returnedAlgoCount:ptr perfResults:ptr"
    ),
    "cudnnFindConvolutionBackwardFilterAlgorithmEx": (
        "handle:ptr xDesc:ptr x:ptr dyDesc:ptr y:ptr convDesc:ptr dwDesc:ptr dw:ptr "
        "requestedAlgoCount:int returnedAlgoCount:ptr perfResults:ptr workSpace:ptr "
        "workSpaceSizeInBytes:size"
    ),
    "cudnnGetConvolutionBackwardFilterWorkspaceSize": (
        "handle:ptr xDesc:ptr dyDesc:ptr convDesc:ptr gradDesc:ptr algo:int sizeInBytes:ptr"
    ),
    "cudnnConvolutionBackwardFilter": (
        "handle:ptr alpha:ptr xDesc:ptr x:ptr dyDesc:ptr dy:ptr convDesc:ptr algo:int "
        "workSpace:ptr workSpaceSizeInBytes:size beta:ptr dwDesc:ptr dw:ptr"
    ),
    # Pooling
    "cudnnCreatePoolingDescriptor": "poolingDesc:ptr",
    "cudnnDestroyPoolingDescriptor": "poolingDesc:ptr",
    "cudnnSetPoolingNdDescriptor": (
        "poolingDesc:ptr mode:int maxpoolingNanOpt:int nbDims:int windowDimA:ptr paddingA:ptr "
        "strideA:ptr"
    ),
    "cudnnPoolingForward": (
        "handle:ptr poolingDesc:ptr alpha:ptr xDesc:ptr x:ptr beta:ptr yDesc:ptr y:ptr"
    ),
    "cudnnPoolingBackward": (
        "handle:ptr poolingDesc:ptr alpha:ptr yDesc:ptr y:ptr dyDesc:ptr dy:ptr xDesc:ptr x:ptr "
        "beta:ptr dxDesc:ptr dx:ptr"
    ),
    # Activation and softmax
    "cudnnCreateActivationDescriptor": "activationDesc:ptr",
    "cudnnDestroyActivationDescriptor": "activationDesc:ptr",
    "cudnnSetActivationDescriptor": "activationDesc:ptr mode:int reluNanOpt:int coef:double",
    "cudnnActivationForward": (
        "handle:ptr activationDesc:ptr alpha:ptr xDesc:ptr x:ptr beta:ptr yDesc:ptr y:ptr"
    ),
    "cudnnActivationBackward": (
        "handle:ptr activationDesc:ptr alpha:ptr yDesc:ptr y:ptr dyDesc:ptr dy:ptr xDesc:ptr "
        "x:ptr beta:ptr dxDesc:ptr dx:ptr"
    ),
    "cudnnSoftmaxForward": (
        "handle:ptr algo:int mode:int alpha:ptr xDesc:ptr x:ptr beta:ptr yDesc:ptr y:ptr"
    ),
    "cudnnSoftmaxBackward": (
        "handle:ptr algo:int mode:int alpha:ptr yDesc:ptr y:ptr dyDesc:ptr dy:ptr beta:ptr "
        "dxDesc:ptr dx:ptr"
    ),
    # Batch normalization
    "cudnnBatchNormalizationForwardTraining": (
        "handle:ptr mode:int alpha:ptr beta:ptr xDesc:ptr x:ptr yDesc:ptr y:ptr "
        "bnScaleBiasMeanVarDesc:ptr bnScale:ptr bnBias:ptr exponentialAverageFactor:double "
        "resultRunningMean:ptr resultRunningVariance:ptr epsilon:double resultSaveMean:ptr "
        "resultSaveInvVariance:ptr"
    ),
    "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize": (
        "handle:ptr mode:int bnOps:int xDesc:ptr zDesc:ptr yDesc:ptr bnScaleBiasMeanVarDesc:ptr "
        "activationDesc:ptr sizeInBytes:ptr"
    ),
    "cudnnGetBatchNormalizationTrainingExReserveSpaceSize": (
        "handle:ptr mode:int bnOps:int activationDesc:ptr xDesc:ptr sizeInBytes:ptr"
    ),
    "cudnnBatchNormalizationForwardTrainingEx": (
        "handle:ptr mode:int bnOps:int alpha:ptr beta:ptr xDesc:ptr xData:ptr zDesc:ptr zData:ptr "
        "yDesc:ptr yData:ptr bnScaleBiasMeanVarDesc:ptr bnScale:ptr bnBias:ptr "
        "exponentialAverageFactor:double resultRunningMean:ptr resultRunningVariance:ptr "
        "epsilon:double resultSaveMean:ptr resultSaveInvVariance:ptr activationDesc:ptr "
        "workspace:ptr workSpaceSizeInBytes:size reserveSpace:ptr reserveSpaceSizeInBytes:size"
    ),
    "cudnnBatchNormalizationForwardInference": (
        "handle:ptr mode:int alpha:ptr beta:ptr xDesc:ptr x:ptr yDesc:ptr y:ptr "
        "bnScaleBiasMeanVarDesc:ptr bnScale:ptr bnBias:ptr estimatedMean:ptr "
        "estimatedVariance:ptr epsilon:double"
    ),
    "cudnnBatchNormalizationBackward": (
        "handle:ptr mode:int alphaDataDiff:ptr betaDataDiff:ptr alphaParamDiff:ptr "
        "betaParamDiff:ptr xDesc:ptr x:ptr dyDesc:ptr dy:ptr dxDesc:ptr dx:ptr "
        "dBnScaleBiasDesc:ptr bnScale:ptr dBnScaleResult:ptr dBnBiasResult:ptr epsilon:double "
        "savedMean:ptr savedInvVariance:ptr"
    ),
    "cudnnGetBatchNormalizationBackwardExWorkspaceSize": (
        "handle:ptr mode:int bnOps:int xDesc:ptr yDesc:ptr dyDesc:ptr dzDesc:ptr dxDesc:ptr "
        "dBnScaleBiasDesc:ptr activationDesc:ptr sizeInBytes:ptr"
    ),
    "cudnnBatchNormalizationBackwardEx": (
        "handle:ptr mode:int bnOps:int alphaDataDiff:ptr betaDataDiff:ptr alphaParamDiff:ptr "
        "betaParamDiff:ptr xDesc:ptr xData:ptr yDesc:ptr yData:ptr dyDesc:ptr dyData:ptr "
        "dzDesc:ptr dzData:ptr dxDesc:ptr dxData:ptr dBnScaleBiasDesc:ptr bnScaleData:ptr "
        "bnBiasData:ptr dBnScaleData:ptr dBnBiasData:ptr epsilon:double savedMean:ptr "
        "savedInvVariance:ptr activationDesc:ptr workSpace:ptr workSpaceSizeInBytes:size "
        "reserveSpace:ptr reserveSpaceSizeInBytes:size"
    ),
    # Dropout
    "cudnnCreateDropoutDescriptor": "dropoutDesc:ptr",
    "cudnnDestroyDropoutDescriptor": "dropoutDesc:ptr",
    "cudnnDropoutGetStatesSize": "handle:ptr sizeInBytes:ptr",
    "cudnnDropoutGetReserveSpaceSize": "xdesc:ptr sizeInBytes:ptr",
    "cudnnSetDropoutDescriptor": (
        "dropoutDesc:ptr handle:ptr dropout:float states:ptr stateSizeInBytes:size seed:ull"
    ),
    "cudnnRestoreDropoutDescriptor": (
        "dropoutDesc:ptr handle:ptr dropout:float states:ptr stateSizeInBytes:size seed:ull"
    ),
    "cudnnDropoutForward": (
        "handle:ptr dropoutDesc:ptr xdesc:ptr x:ptr ydesc:ptr y:ptr reserveSpace:ptr "
        "reserveSpaceSizeInBytes:size"
    ),
    "cudnnDropoutBackward": (
        "handle:ptr dropoutDesc:ptr dydesc:ptr dy:ptr dxdesc:ptr dx:ptr reserveSpace:ptr "
        "reserveSpaceSizeInBytes:size"
    ),
    # Spatial transformer
    "cudnnCreateSpatialTransformerDescriptor": "stDesc:ptr",
    "cudnnDestroySpatialTransformerDescriptor": "stDesc:ptr",
    "cudnnSetSpatialTransformerNdDescriptor": (
        "stDesc:ptr samplerType:int dataType:int nbDims:int dimA:ptr"
    ),
    "cudnnSpatialTfGridGeneratorForward": "handle:ptr stDesc:ptr theta:ptr grid:ptr",
    "cudnnSpatialTfGridGeneratorBackward": "handle:ptr stDesc:ptr dgrid:ptr dtheta:ptr",
    "cudnnSpatialTfSamplerForward": (
        "handle:ptr stDesc:ptr alpha:ptr xDesc:ptr x:ptr grid:ptr beta:ptr yDesc:ptr y:ptr"
    ),
    "cudnnSpatialTfSamplerBackward": (
        "handle:ptr stDesc:ptr alpha:ptr xDesc:ptr x:ptr beta:ptr dxDesc:ptr dx:ptr "
        "alphaDgrid:ptr dyDesc:ptr dy:ptr grid:ptr betaDgrid:ptr dgrid:ptr"
    ),
    # Recurrent networks
    "cudnnCreateRNNDescriptor": "rnnDesc:ptr",
    "cudnnDestroyRNNDescriptor": "rnnDesc:ptr",
    "cudnnSetRNNDescriptor_v8": (
        "rnnDesc:ptr algo:int cellMode:int biasMode:int dirMode:int inputMode:int dataType:int "
        "mathPrec:int mathType:int inputSize:int hiddenSize:int projSize:int numLayers:int "
        "dropoutDesc:ptr auxFlags:uint"
    ),
    "cudnnCreateRNNDataDescriptor": "rnnDataDesc:ptr",
    "cudnnDestroyRNNDataDescriptor": "rnnDataDesc:ptr",
    "cudnnSetRNNDataDescriptor": (
        "rnnDataDesc:ptr dataType:int layout:int maxSeqLength:int batchSize:int vectorSize:int "
        "seqLengthArray:ptr paddingFill:ptr"
    ),
    "cudnnGetRNNWeightSpaceSize": "handle:ptr rnnDesc:ptr weightSpaceSize:ptr",
    "cudnnGetRNNTempSpaceSizes": (
        "handle:ptr rnnDesc:ptr fwdMode:int xDesc:ptr workSpaceSize:ptr reserveSpaceSize:ptr"
    ),
    "cudnnGetRNNWeightParams": (
        "handle:ptr rnnDesc:ptr pseudoLayer:int weightSpaceSize:size weightSpace:ptr "
        "linLayerID:int mDesc:ptr mAddr:ptr bDesc:ptr bAddr:ptr"
    ),
    "cudnnRNNForward": (
        "handle:ptr rnnDesc:ptr fwdMode:int devSeqLengths:ptr xDesc:ptr x:ptr yDesc:ptr y:ptr "
        "hDesc:ptr hx:ptr hy:ptr cDesc:ptr cx:ptr cy:ptr weightSpaceSize:size weightSpace:ptr "
        "workSpaceSize:size workSpace:ptr reserveSpaceSize:size reserveSpace:ptr"
    ),
    "cudnnRNNBackwardData_v8": (
        "handle:ptr rnnDesc:ptr devSeqLengths:ptr yDesc:ptr y:ptr dy:ptr xDesc:ptr dx:ptr "
        "hDesc:ptr hx:ptr dhy:ptr dhx:ptr cDesc:ptr cx:ptr dcy:ptr dcx:ptr weightSpaceSize:size "
        "weightSpace:ptr workSpaceSize:size workSpace:ptr reserveSpaceSize:size reserveSpace:ptr"
    ),
    "cudnnRNNBackwardWeights_v8": (
        "handle:ptr rnnDesc:ptr addGrad:int devSeqLengths:ptr xDesc:ptr x:ptr hDesc:ptr hx:ptr "
        "yDesc:ptr y:ptr weightSpaceSize:size dweightSpace:ptr workSpaceSize:size workSpace:ptr "
        "reserveSpaceSize:size reserveSpace:ptr"
    ),
}


class AlgorithmPerformance(ctypes.Structure):
    """``cudnnConvolution{Fwd,BwdData,BwdFilter}AlgoPerf_t``: the three have the same fields."""

    _fields_ = (
        ("algo", ctypes.c_int),
        ("status", ctypes.c_int),
        ("time", ctypes.c_float),  # milliseconds; -1 when not run
        ("memory", ctypes.c_size_t),  # workspace, bytes
        ("determinism", ctypes.c_int),
        ("mathType", ctypes.c_int),
        ("reserved", ctypes.c_int * 3),
    )


def argument_types(function: str) -> list[type]:
    """Return the :mod:`ctypes` types of a function's parameters."""
    return [CTYPES[parameter.partition(":")[2]] for parameter in PROTOTYPES[function].split()]
