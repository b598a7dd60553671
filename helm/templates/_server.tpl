{{/* The pod that serves: (dict "root" $ "role" …). server answers requests; follower holds a part of its model. */}}
{{- define "lowbit.serverPod" -}}
{{- $ := .root -}}
metadata:
  labels:
    {{- include "lowbit.commonLabels" $ | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with $.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/settings: {{ include "lowbit.settings" $ | sha256sum }}
    {{- if eq .role "follower" }}
    {{- include "lowbit.checkovSkips" (list $ "CKV_K8S_8:follower" "CKV_K8S_9:follower" "CKV_K8S_11") | indent 4 }}
    {{- else if include "lowbit.multiNode" $ }}
    {{- include "lowbit.checkovSkips" (list $ "CKV_K8S_11") | indent 4 }}
    {{- end }}
    {{- with $.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "lowbit.podBase" $ | nindent 2 }}
  terminationGracePeriodSeconds: {{ $.Values.shutdown.terminationGracePeriodS }}
  {{- include "lowbit.checkpointFirst" $ | nindent 2 }}
  containers:
    - name: {{ .role }}
      {{- include "lowbit.containerBase" $ | nindent 6 }}
      args: [serve]
      envFrom:
        - configMapRef: {name: {{ include "lowbit.fullname" $ }}}
      env:
        {{- include "lowbit.serverEnv" $ | nindent 8 }}
      {{- if eq .role "server" }}
      ports:
        - name: http
          containerPort: 8000
      {{- include "lowbit.probes" $ | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $.Values.shutdown.preStopS | quote }}]
      resources:
        {{- include "lowbit.resources" (dict "resources" $.Values.resources "gpus" $.Values.gpu.count "resourceName" $.Values.gpu.resourceName) | nindent 8 }}
      volumeMounts:
        {{- include "lowbit.volumeMounts" $ | nindent 8 }}
    {{- if eq .role "server" }}
    {{- with $.Values.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
  volumes:
    {{- include "lowbit.volumes" $ | nindent 4 }}
  {{- include "lowbit.placement" $ | nindent 2 }}
  {{- with $.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $.Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq .role "server" }}
  {{- include "lowbit.spread" $ | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A LeaderWorkerSet puts LWS_… before these, so that they can refer to it. */}}
{{- define "lowbit.serverEnv" -}}
{{ include "lowbit.homeEnv" . }}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if include "lowbit.multiNode" . }}
- {name: LOWBIT_NODE_RANK, value: $(LWS_WORKER_INDEX)}
- {name: LOWBIT_MASTER_ADDR, value: $(LWS_LEADER_ADDRESS)}
- {name: VLLM_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "lowbit.spread" -}}
{{- with .Values.topologySpread.topologyKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "lowbit.selectorLabels" $ | nindent 8 }}
    {{- if not (include "lowbit.multiNode" $) }}
    # Of the old and the new pods of a rollout, each is spread by itself.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
{{- end }}
{{- end -}}

{{/* What must be there before the server starts: the Job's checkpoint, or the download of one. */}}
{{- define "lowbit.checkpointFirst" -}}
{{- if .Values.quantize.enabled -}}
initContainers:
  - name: wait-for-checkpoint
    {{- include "lowbit.containerBase" . | nindent 4 }}
    # The manifest is written last.
    command: [sh, -c, 'until [ -f "$LOWBIT_DIR/lowbit.json" ]; do sleep 5; done']
    envFrom:
      - configMapRef: {name: {{ include "lowbit.fullname" . }}}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {memory: 64Mi}
    volumeMounts:
      - {name: checkpoint, mountPath: /checkpoint, readOnly: true}
{{- else if .Values.checkpoint.hub.id -}}
{{- $id := splitList "@" .Values.checkpoint.hub.id -}}
initContainers:
  - name: download-checkpoint
    {{- include "lowbit.containerBase" . | nindent 4 }}
    command: [hf, download, {{ first $id }}, --revision, {{ last $id | quote }}, --local-dir, /checkpoint]
    env:
      {{- include "lowbit.homeEnv" . | nindent 6 }}
      # The image says offline, for serving.
      - {name: HF_HUB_OFFLINE, value: "0"}
      {{- include "lowbit.hubEnv" .Values.checkpoint.hub | indent 6 }}
    resources:
      {{- include "lowbit.resources" (dict "resources" .Values.resources "gpus" 0) | nindent 6 }}
    volumeMounts:
      - {name: checkpoint, mountPath: /checkpoint}
      - {name: tmp, mountPath: /tmp}
      - {name: cache, mountPath: /cache}
      {{- include "lowbit.hubMount" .Values.checkpoint.hub | indent 6 }}
{{- end -}}
{{- end -}}
